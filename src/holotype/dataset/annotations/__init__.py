"""Readers of annotation formats: each tells what a file says about images, not what becomes of it."""
