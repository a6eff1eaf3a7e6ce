"""From folders of speech, noise and rooms to a packaged model. Needs the `train` extra."""
