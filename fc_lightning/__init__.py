"""fc_lightning."""
