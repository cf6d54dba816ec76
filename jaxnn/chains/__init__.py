"""Perturbation search."""
