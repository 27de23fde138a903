"""The validate stage: parity of every target, and what a user's own CI makes of it."""
