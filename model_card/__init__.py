"""From records to a model card, a release folder and a Hub repository."""
