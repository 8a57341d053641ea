"""What the stages found, as a page, a picture and a table of the documentation."""
