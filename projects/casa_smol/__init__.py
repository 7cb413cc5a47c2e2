"""casa-smol: how SmolLM2 gets eyes for text, charts, screens and drawings. README.md says the plan and the commands."""
