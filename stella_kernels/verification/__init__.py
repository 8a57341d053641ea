"""The one table of cases by which every backend is judged, its data, and the judge."""
