"""One YAML file a recipe, found by name."""
