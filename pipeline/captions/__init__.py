"""Word timings of long videos: the files that aligners and subtitles come in, and which of their words become clips."""
