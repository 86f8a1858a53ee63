/** Types of build.mjs, which is plain JavaScript because the bootstrap runs it before anything is built. */
export declare const ENVD_NODE_OPTIONS: readonly string[];
export declare function buildEnvd(
  outDir: string,
  options?: { arch?: string },
): Promise<{ bundle: string; native: string }>;
