"""Other projects' samplers, fused. Each module imports its project when it is imported itself."""
