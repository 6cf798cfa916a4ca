"""From a command line or a saved config to checked values and objects."""
