"""What happens when relations are turned, objects erased, or positions deleted or shuffled."""
