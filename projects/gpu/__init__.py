"""All that is measured where there is a GPU, by one command (`make gpu`)."""
