"""What every stage stands on: recipe, run directory, names, files, errors, numbers."""
