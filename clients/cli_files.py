"""The commands that make, copy, change and remove files."""

import os
import sys

import click

import dax_mp
from dax_mp.clients import cli_copy
from dax_mp.clients.cli_names import expand, for_each
from dax_mp.clients.cli_options import as_size, endpoint_option, json_option, name_argument
from dax_mp.clients.standard_streams import printable


@click.command()
@click.argument("file", metavar="FILE", type=click.Path())
@name_argument(metavar="[NAME]", required=False)
@endpoint_option
def put(file: str, name: str | None, endpoint: str | None) -> None:
    """Copy FILE (- for stdin) to the device.

    Its name there is NAME, by default the name that it has here. A file of that name is replaced when the copy is
    complete. Holes stay holes.
    """
    if name is None and file == cli_copy.STREAM:
        raise click.UsageError("stdin has no name: give one (put - NAME)")
    target = os.path.basename(file) if name is None else name
    if not target or "/" in target:
        raise click.UsageError(f"{target!r} is no file name: there are no directories")
    with dax_mp.connect(endpoint) as session:
        cli_copy.put(session, file, target)


@click.command()
@name_argument()
@click.argument("file", metavar="[FILE]", type=click.Path(), required=False)
@endpoint_option
def get(name: str, file: str | None, endpoint: str | None) -> None:
    """Copy a file from the device to FILE (- for stdout).

    FILE may be a directory; by default it is a file NAME in the current one. A regular file is replaced when the copy
    is complete, and keeps its mode; a pipe or a device is written to. Holes stay holes.
    """
    if file is None:
        file = name if name != cli_copy.STREAM else os.path.join(os.curdir, name)
    with dax_mp.connect(endpoint) as session:
        cli_copy.get(session, name, file)


@click.command()
@name_argument("names", "NAME...", nargs=-1, required=True)
@endpoint_option
def cat(names: tuple[str, ...], endpoint: str | None) -> int:
    """Print the contents of files, one after the other.

    A NAME may be a pattern ('*.log', quoted).
    """
    with dax_mp.connect(endpoint) as session:
        return for_each(expand(session, names), lambda name: cli_copy.cat(session, name))


@click.command()
@name_argument("source", "SOURCE")
@name_argument("target", "TARGET")
@endpoint_option
def cp(source: str, target: str, endpoint: str | None) -> None:
    """Copy a file on the device, with its attributes.

    TARGET is replaced when the copy is complete. Holes stay holes.
    """
    with dax_mp.connect(endpoint) as session:
        cli_copy.copy(session, source, target)


@click.command()
@name_argument("old", "OLD")
@name_argument("new", "NEW")
@click.option("-n", "--no-clobber", is_flag=True, help="Fail if there is a file NEW.")
@endpoint_option
def mv(old: str, new: str, no_clobber: bool, endpoint: str | None) -> None:
    """Rename a file on the device.

    A file that has the name NEW is replaced; it lives on where it is mapped.
    """
    with dax_mp.connect(endpoint) as session:
        session.rename(old, new, replace=not no_clobber)


@click.command()
@name_argument("names", "NAME...", nargs=-1)
@click.option("-f", "--force", is_flag=True, help="Say nothing of files that are not there.")
@endpoint_option
def rm(names: tuple[str, ...], force: bool, endpoint: str | None) -> int:
    """Remove files.

    A NAME may be a pattern ('*.tmp', quoted). A file that is mapped lives on until its last user is gone.
    """
    if not names and not force:
        raise click.UsageError("Missing argument 'NAME...'.")
    with dax_mp.connect(endpoint) as session:
        return for_each(expand(session, names), session.unlink, ignore_missing=force)


@click.command()
@name_argument("names", "NAME...", nargs=-1, required=True)
@click.option("-c", "--no-create", is_flag=True, help="Make no file.")
@endpoint_option
def touch(names: tuple[str, ...], no_create: bool, endpoint: str | None) -> int:
    """Set the times of files to now.

    A file that is not there is made, empty.
    """
    with dax_mp.connect(endpoint) as session:

        def touch_one(name: str) -> None:
            with session.open(name, "r+" if no_create else "a") as file:
                file.utime()

        return for_each(names, touch_one, ignore_missing=no_create)


@click.command()
@name_argument()
@click.argument("size", metavar="SIZE", callback=as_size)
@click.option("--create", is_flag=True, help="Make the file if it is not there.")
@endpoint_option
def truncate(name: str, size: int, create: bool, endpoint: str | None) -> None:
    """Set the size of a file.

    A file that shrinks loses what is past its end, also where it is mapped. A file that grows gets a hole.
    """
    with dax_mp.connect(endpoint) as session, session.open(name, "a" if create else "r+") as file:
        file.truncate(size)


@click.command()
@name_argument()
@click.argument("offset", metavar="OFFSET", callback=as_size)
@click.argument("length", metavar="LENGTH", callback=as_size)
@click.option("-p", "--punch-hole", is_flag=True, help="Free the range, which then reads as zero.")
@click.option("-z", "--zero-range", is_flag=True, help="Make the range zero, with blocks.")
@click.option("-c", "--collapse-range", is_flag=True, help="Take the range out: what follows moves down.")
@click.option("-i", "--insert-range", is_flag=True, help="Put a hole in: what was there moves up.")
@click.option("-n", "--keep-size", is_flag=True, help="Keep the size of the file, also if the range is past its end.")
@click.option("--create", is_flag=True, help="Make the file if it is not there.")
@endpoint_option
def fallocate(
    name: str,
    offset: int,
    length: int,
    punch_hole: bool,
    zero_range: bool,
    collapse_range: bool,
    insert_range: bool,
    keep_size: bool,
    create: bool,
    endpoint: str | None,
) -> None:
    """Allocate space for a range of a file, or free it.

    The range is LENGTH bytes from OFFSET on. Without an option it gets blocks, which read as zero, so that no later
    store finds the device full. A range that is taken out or put in has to begin and end with a page.
    """
    operations = {"punch": punch_hole, "zero": zero_range, "collapse": collapse_range, "insert": insert_range}
    chosen = [operation for operation, given in operations.items() if given]
    if len(chosen) > 1:
        raise click.UsageError("--punch-hole, --zero-range, --collapse-range and --insert-range: one of them")
    if keep_size and chosen in (["collapse"], ["insert"]):
        raise click.UsageError("what takes a range out or puts one in changes the size")
    with dax_mp.connect(endpoint) as session, session.open(name, "a" if create else "r+") as file:
        if punch_hole:
            file.punch_hole(offset, length)
        elif zero_range:
            file.zero_range(offset, length, keep_size)
        elif collapse_range:
            file.collapse_range(offset, length)
        elif insert_range:
            file.insert_range(offset, length)
        else:
            file.fallocate(offset, length, keep_size)


@click.command()
@name_argument()
@click.argument("offset", metavar="OFFSET", callback=as_size)
@click.argument("length", metavar="LENGTH", callback=as_size)
@endpoint_option
def punch(name: str, offset: int, length: int, endpoint: str | None) -> None:
    """Make a hole in a file (fallocate --punch-hole).

    LENGTH bytes from OFFSET on then read as zero, and the blocks of whole pages are free.
    """
    with dax_mp.connect(endpoint) as session, session.open(name, "r+") as file:
        file.punch_hole(offset, length)


# --- attributes ----------------------------------------------------------------------------------------------------


@click.group()
def xattr() -> None:
    """Read and change the attributes of a file."""


@xattr.command("get")
@name_argument()
@click.argument("attribute", metavar="ATTRIBUTE")
@endpoint_option
def xattr_get(name: str, attribute: str, endpoint: str | None) -> None:
    """Print the value of an attribute.

    It is printed as it is; on a terminal its control characters are escaped, and a newline follows.
    """
    with dax_mp.connect(endpoint) as session, session.open(name) as file:
        value = file.getxattr(attribute)
    if sys.stdout.isatty():
        print(printable(value.decode(errors="backslashreplace")))
    else:
        sys.stdout.buffer.write(value)


@xattr.command("set")
@name_argument()
@click.argument("attribute", metavar="ATTRIBUTE")
@click.argument("value", metavar="VALUE")
@endpoint_option
def xattr_set(name: str, attribute: str, value: str, endpoint: str | None) -> None:
    """Set the value of an attribute."""
    with dax_mp.connect(endpoint) as session, session.open(name, "r+") as file:
        file.setxattr(attribute, os.fsencode(value))


@xattr.command("list")
@name_argument()
@json_option
@endpoint_option
def xattr_list(name: str, json_output: bool, endpoint: str | None) -> None:
    """Print the names of a file's attributes."""
    from dax_mp.clients import cli_show

    with dax_mp.connect(endpoint) as session, session.open(name) as file:
        cli_show.show_names(file.listxattr(), json_output)


@xattr.command("remove")
@name_argument()
@click.argument("attribute", metavar="ATTRIBUTE")
@endpoint_option
def xattr_remove(name: str, attribute: str, endpoint: str | None) -> None:
    """Remove an attribute."""
    with dax_mp.connect(endpoint) as session, session.open(name, "r+") as file:
        file.removexattr(attribute)
