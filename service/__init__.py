"""The service: whole files over HTTP, enhanced by the same engine as the library."""
