"""What is written for one clip and query: masks, pictures, cut-outs, and the record of how they came about."""
