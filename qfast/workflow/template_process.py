"""Renders one Jinja2 template in a process with limited memory and time. `qfast.workflow.template` runs it as a script.

It reads JSON from stdin: the template, its variables, the limits and the import path. It writes JSON to stdout: the
rendered text, or an error with its line. It imports nothing of qfast, so it starts fast.
"""

import json
import sys


def _limit(memory_bytes: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system; the parent still limits the time
        return
    for name, value in (("RLIMIT_AS", memory_bytes), ("RLIMIT_CPU", seconds)):
        kind = getattr(resource, name, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                resource.setrlimit(kind, (allowed, hard))
            except (OSError, ValueError):  # the platform does not support this limit
                continue


def _render(job: dict) -> dict:
    import jinja2
    import jinja2.meta
    import jinja2.sandbox

    try:
        # Without the sandbox, a template could access Python's internals.
        environment = jinja2.sandbox.SandboxedEnvironment()
        names = jinja2.meta.find_undeclared_variables(environment.parse(job["text"]))
        template = environment.from_string(job["text"])
        parts, size = [], 0
        for part in template.generate(job["variables"]):
            size += len(part)
            if size > job["characters"]:
                return {"error": "size"}
            parts.append(part)
        return {"text": "".join(parts), "names": sorted(names)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "syntax", "line": error.lineno, "message": error.message}
    except MemoryError:
        return {"error": "memory"}
    except Exception as error:
        return {"error": "other", "message": f"{error}" or type(error).__name__}


if __name__ == "__main__":
    work = json.load(sys.stdin)
    sys.path[:] = work["path"]
    _limit(work["memory"], work["seconds"])
    sys.stdout.write(json.dumps(_render(work)))
