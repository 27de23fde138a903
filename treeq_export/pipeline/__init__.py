"""The stages of a run, what each depends on and writes, and the folder that they share."""
