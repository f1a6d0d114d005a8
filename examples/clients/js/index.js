// Runs a loradeploy bundle: see README.md.
export { load } from "./src/model.js";
export { AdapterError, BundleError, LoraDeployError, UsageError } from "./src/errors.js";
