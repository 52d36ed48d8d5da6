"""The built-in plugin `core`: models, datasets, evaluators and trainers."""
