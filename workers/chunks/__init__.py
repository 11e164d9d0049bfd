"""Chunks: the device calls of several runs that are made as one.

    calls    what a run asks of the device (DeviceCall), what calls must agree in to be made as one (ChunkKey), and how
             those that do become one (Joint)
    members  the runs as the line sees them: who is waited for, who shared with whom
    line     the calls that wait, and which are made next, together
    limits   how many rows pay, as measured; kept in a file
    tables   per class of module: which argument is batched, padded, listed or shared; with it, and like it with torch:
             arguments (what that means), outputs (to each its rows), methods (calls that follow a table, their Joint)

Nothing else here knows of torch; nothing knows of jobs beyond their members.
"""
