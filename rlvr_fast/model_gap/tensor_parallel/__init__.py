"""Layers spread over tensor-parallel ranks: what a rank has of their gradients, and how ranks add up to one gap."""
