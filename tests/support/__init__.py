"""What several test files share: frames, fits, stores, workflows, and the cases of each operator."""
