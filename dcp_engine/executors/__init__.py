"""Where and when a callable runs: on a thread, or in a process.

What is run is the caller's: nothing here knows of saves. ``ordered_thread`` has the thread,
``process`` the process.
"""
