"""Several runs over one base at a time, whose steps share its passes."""
