"""Put the chosen plugins together: find them by name, read their options, check and order them, explain the result."""
