"""Attaching to diffusers: the processor users set, the binding to a model, and what differs between families."""
