"""The audits: what each layer of a compiled graph became."""
