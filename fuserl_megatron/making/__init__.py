"""From prompts to responses: sources are asked, answers are kept exactly once."""
