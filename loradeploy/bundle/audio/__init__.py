"""Sound as a model reads it: files, features, languages. numpy alone."""
