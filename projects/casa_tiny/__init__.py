"""How casa-tiny, the model in the package, was made."""
