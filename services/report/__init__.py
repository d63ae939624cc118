"""Reports: an HTML file about a sweep that opens offline, contact sheets, the farm's status."""
