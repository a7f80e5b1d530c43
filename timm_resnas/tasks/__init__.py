"""Training tasks: subclasses of `timm.task.TrainingTask`."""
