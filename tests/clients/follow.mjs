// What every EventSource is asked to do, the npm package's and the browser's: follow `url` and say what happens.

export function follow(EventSource, url, say) {
    const names = ["start", "insert", "update", "delete", "uptodate", "resync", "closed", "failed"];
    const source = new EventSource(url);
    source.onopen = () => say({ state: "open" });
    // By its own account it is coming back (0, connecting) or has given up (2, closed).
    source.onerror = () => say({ state: source.readyState === 2 ? "stopped" : "lost" });
    for (const name of names) {
        source.addEventListener(name, (event) => say({ name, data: event.data }));
    }
}
