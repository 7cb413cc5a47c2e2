"""How the shipped models and the studies were made. Imports casa, is never imported by it, not in the wheel."""
