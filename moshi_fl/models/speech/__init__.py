"""Speech: the Mimi codec, the Moshi language model and its layers, all of them streaming."""
