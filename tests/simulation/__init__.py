"""Many clients and one coordinator in one process, where every delivery of a message is an event of its own.

`client`    a client as the native pager makes it: windows with real translations, channels, threads
`world`     clients and coordinator together, the events that are possible, and what must hold after each of them
`spec`      what one page of a file may show, whoever looks: the judge of what the threads have seen
`explore`   every order of the events of a small world
`soak`      one random, long order of many events, from a seed

The pages are small (`PAGE_SIZE`), so that a world costs nothing. A page's content is one number, its first bytes.
"""
