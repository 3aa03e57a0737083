"""Device memory by stage and model: the section of every report, whatever is attached."""
