"""Arithmetic on shapes: parameters and bytes of any model under any method. Imports no torch."""
