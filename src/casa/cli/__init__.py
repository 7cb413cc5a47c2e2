"""The command line: parse, call, print. Every verb is a thin file of its own."""
