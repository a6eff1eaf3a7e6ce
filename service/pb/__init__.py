"""Code generated from `protos/`; `python -m service.pb.generate` writes it again."""
