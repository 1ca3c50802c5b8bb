"""Workflows: a YAML file becomes checked objects, a run folder, a report; and scores for new data."""
