"""Parameter holders of the models: what a layer owns, under its checkpoint names."""
