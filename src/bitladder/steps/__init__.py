"""What single verbs do, and what a run is put together from: stages joined with files and stored evidence."""
