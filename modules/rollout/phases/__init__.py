"""What a phase of training samples beyond one call of the engine: further prompts, parts, phases ahead, and drafts."""
