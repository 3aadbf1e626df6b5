"""The parts that a recipe strings together: loss, validation, schedules, metrics file. Called by recipes."""
