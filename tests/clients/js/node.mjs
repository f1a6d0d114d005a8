// Runs the jobs on stdin in Node, with the client at the given path.
import { readFileSync } from "node:fs";
import { runJobs } from "./jobs.mjs";

const { load } = await import(process.argv[2]);
console.log(JSON.stringify(await runJobs(load, JSON.parse(readFileSync(0, "utf8")))));
