"""The paper's claims measured on small models: a study is data, and is run, resumed and collected by commands."""
