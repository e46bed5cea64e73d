"""Measuring models: metrics on labelled data, two models side by side, speed, and what the runtime made of a model."""
