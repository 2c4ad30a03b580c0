"""Measure one point, from models to a Result."""
