"""What recipes share: options, run folders, processes, training, searching, reports. Imported by recipes only."""
