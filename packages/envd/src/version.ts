/**
 * The version of E2B's envd whose protocol this one speaks. Its clients turn
 * features on by it (0.6.4 and later: all that they have); plain semver only.
 */
export const ENVD_VERSION = "0.6.13";
